"""Federated averaging on separate machines with Flower (https://flower.ai): see docs/federated.md.

``rounds.py`` holds both sides of a round and ``identity.py`` who may take part; they know nothing of
Flower. ``server.py``, with its ``nodes.py``, and ``client.py`` connect them to Flower's messages;
``superlink.py`` starts Flower's server behind a fence; ``app/`` is what ``flwr run`` ships; ``demo.py`` does
all of it on this machine. Everything but ``rounds.py`` and ``processes.py`` needs requirements-federated.txt.
"""
