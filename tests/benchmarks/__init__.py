"""Side-by-side measurements: this trainer and its peers on one machine, same base, data, rank and optimizer.

    cases.py    what is compared: named cases, each with contenders and targets
    runner.py   runs them: every run of every contender in its own process, interleaved
    process.py  one piece of work in a fresh process, with a time limit
    machine.py  on what it was measured       record.py  where figures are kept
    table.py    medians, and ratios against one contender
    pieces/     what those processes do: ours, the peers, loading, merging, making the inputs
    gpu_suite/  everything that needs a GPU, in stages

No wall-clock is asserted anywhere in the tests: speed is measured here, and LOG.md keeps what was found.
"""
