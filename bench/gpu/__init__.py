"""``python -m bench gpu-check``: what it does in which order stands in ``plan``.

``stage`` says what a stage is, ``runner`` runs each in a process of its own, ``results`` keeps what is known
after each of them, ``summary`` writes it down.  ``prebuilt`` makes the folder that is carried to a machine
without a network.
"""
