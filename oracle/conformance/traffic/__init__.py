"""Random traffic: a simulated engine, and serving histories that Hypothesis draws and shrinks."""
