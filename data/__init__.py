"""Data sets: what is read, how it is dealt out, and commands that prepare folders of pictures."""

from utils.command import begin_module

begin_module()
