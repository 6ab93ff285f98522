"""``python -m bench gpu-check``: ``plan`` says what it does, and in which order.

``stage`` says what a stage is.  ``runner`` runs each in a process of its own, ``results`` keeps on disk what
is known after each of them, and ``summary`` writes the report.  ``prebuilt`` makes the folder that is carried
to a machine without a network."""
