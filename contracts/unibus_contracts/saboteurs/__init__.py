"""Proof that the suite catches: adapters that are broken on purpose, each caught by the contracts that are meant to.

python -m unibus_contracts.saboteurs            each against the contracts meant to catch it; the table
python -m unibus_contracts.saboteurs --all      each against the whole suite: what else catches it
python -m unibus_contracts.saboteurs NAME...    these only
"""
