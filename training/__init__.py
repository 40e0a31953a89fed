"""From a configuration to a trained run, its scores and what pruning by them is worth."""

from utils.command import begin_module

begin_module()
