"""A small order service, and a demo that sends it a file of orders and checks what became of each of them."""
