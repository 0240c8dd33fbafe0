"""The contract suite of unibus: what every adapter promises, run on a real broker.

    pytest --pyargs unibus_contracts --unibus-url amqp://...     one broker; --unibus-report FILE, --unibus-prefix TEXT
    ... --unibus-pin FOLDER                                      fail where it differs from the answers pinned there
    python -m unibus_contracts memory:// amqp://...              several, a report each, a line each at the end
    python -m unibus_contracts.summary reports/*.json            the lines again; the status is 0 if all have passed
    python -m unibus_contracts.pins reports/*.json               pin the answers of these runs
    python -m unibus_contracts.saboteurs                         proof that the suite catches

Each contract has a stable id, a promise of one sentence and, where it needs one, a feature. On an adapter that declares
the feature refused, the refusal is checked in its place. A feature that is declared and that no passed contract has used
fails the run. Times are multiplied by UNIBUS_TEST_TIMEOUT_FACTOR.
"""
