"""Homogeneous Learning: one model walks over nodes with skewed data, and an agent learns who trains it next (Sun and
Ochiai, IEEE Access 2022, arXiv 2110.05290).

world.py        nodes, links, distances, goal: what a walk may do, what it costs, what is seen of it
environment.py  the same as a Gymnasium environment, and as many at once for Stable-Baselines3
policies.py     who decides without having learned: random, tours, staying, the look-ahead
schedule.py     a fixed order of visits, improved by the exact gradient of what it leads to
agent.py        who has learned: a DQN, trained, kept and read back
paper.py        the paper's world and its agent, as published (--paper)
order.py        the agent's choices as the order of a real run (main.py --chain_order policy)
evaluation.py   all of them on walks that nobody has seen, with intervals
"""

from utils.command import begin_module

begin_module()
