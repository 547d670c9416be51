"""Pure torch maths of the recipe. Shapes: B sequences, T tokens, K answers; [B, T] tensors follow `actors.batch`'s alignment.

Losses are returned as sums over an explicit `denominator`, so that micro-batches and ranks add up to the same number as one batch.
"""
