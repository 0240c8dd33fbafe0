"""What a message costs: unibus beside the raw client, in one run, on one broker. docs/performance.md says how to read it.

`cases` what is measured and how the samples of one run become a table and JSON · `watch` wall time, CPU time, profile ·
`load` senders and bodies · `flows` the turns of contestants, `brokers` all cases on one broker · `memory` the core path · `unibus` and
the raw clients: `rabbitmq`, `rabbitmq_raw`, `rabbitmq_socket`, `kafka`, `redis`, `sqs` · `confluent`, `faststream`, `mq_bridge`, `tools`
who else is measured · `fanout`, `cold` with `first_message`, `workers` with `served`, `growth` with `growth_point`, `backlog` the other
cases, in new interpreters by `children` · `goals` what is aimed at · `floor` what must not fall · `page` and `plots` docs/performance.md.
"""
