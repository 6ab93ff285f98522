"""Benchmarks: ``python -m bench list | run | compare | report | gpu-check | gpu-prebuilt``.

``registry`` names the ops, ``timing`` measures, ``baselines`` holds what is compared against, ``table``
prints and ``report`` plots.  Every ratio comes from times taken in turns within one run."""
