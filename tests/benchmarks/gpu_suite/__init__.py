"""Everything that needs a GPU, by one command, for a machine that is had for minutes and has no network.

    stages.py     what is done, in which order, how long it may take; the same with tiny shapes for a dry run
    command.py    takes the stages, each in a process of its own, and keeps records
    report.py     records as tables
    smoke.py      the whole quickstart: train, evaluate, kill, resume, export, generate, the CPU's losses
    test_file.py  the tests of one file that are marked `gpu`
    training.py   `train` on a large shape with random weights: memory and speed, side by side, traced
    points.py     operation by operation, beside what could be done instead
    timing.py     how long an operation takes, and how many kernels it is
    learns.py     a model pre-trained here, then adapted in NF4 and in 16 bits
    traces.py     a profiler trace and the allocator's history as short tables
    peer.py       one peer on the case that we are measured on

A stage's figures are `runs` (figures by name, a row of the table each), `remarks` (in words) and `problems`
(what did not hold; a stage with problems has failed).
"""
