"""The embedded world: a small assistant's world in which every reply can be graded exactly.

grammar.py    its words, the sentences people say in it, and how those sentences are read back
scenarios.py  conversations: which turns follow each other, demonstrations good and bad, prompts
texts.py      plain text about its things, for pretraining and PPO-ptx
gold.py       the exact grade of a reply (never seen by training: only the simulated labeller and `evaluate` may import it)
"""
