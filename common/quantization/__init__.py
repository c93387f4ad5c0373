"""Full precision -> W8A8 (calibrate, smooth, quantise) or int4 weights (rotate, quantise), and see what it did.

Algorithms go from weights to weights; `stream` runs them over a model, layer by layer.
"""
