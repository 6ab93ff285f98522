"""An interpreter for the PTX of this package's kernels: compiled code executed on the CPU, bit for bit.

``parser`` reads PTX text, ``arithmetic`` has the instructions that compute, ``memory`` the checked memory,
and ``machine`` runs the threads of a grid."""
