"""The ledger: what every worker did is signed, chained and can be replayed; rewards are paid by audited value.

keys.py       a key for every worker
merkle.py     the root of a list, and the proof that something is in it
store.py      content-addressed files
records.py    what a worker signs after a round, and how records are chained
observer.py   main.py --ledger: writes them as the run goes
verify.py     signatures, chains, roots: what can be checked without training
replay.py     a round computed again, to the bit
dispute.py    two ledgers of one run: where they part, and who is convicted
chain.py      an EVM; contracts/, trees.py, amounts.py, payout.py: who is paid what, and why that can be checked
"""

from utils.command import begin_module

begin_module()
