"""The kinds of sources that score replies, one module each; `actors/reward.py` adds them up."""
