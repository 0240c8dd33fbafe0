"""What a message costs: unibus beside the raw client, in one run, on one broker. docs/performance.md says how to read it.

`cases` what is measured and how the samples of one run become a table and JSON · `watch` wall time, CPU time, profile ·
`load` senders and bodies · `memory` the core path · `rabbitmq` the contestants on RabbitMQ, `rabbitmq_raw` and
`rabbitmq_socket` the ones that unibus is compared with.
"""
