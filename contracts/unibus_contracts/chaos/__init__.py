"""Real work while the system is being broken, and a history that proves what became of it.

`python -m unibus_contracts.chaos kafka --seed 7`: a broker of its own, a proxy in front of it, producers and consumers as processes
of their own (`worker`), a schedule of faults (`faults`) drawn from the seed, a drain, and the verdict of `unibus_contracts.history`.
"""
