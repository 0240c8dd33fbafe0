"""Brokers beside each other, measured: `unibus compare`. docs/compare.md says how every number comes about.

    targets -> lab -> probes/* -> run (a document of plain data) -> table, page, JSON; `against` an older document

A probe uses the public interface and the SPI, and knows no broker by name.
"""
