"""What a fully connected layer computes. From the first to the last file, `gemm` being the idea:

problem, signmag, products (the reference), proof, engines, gemm, exact. No clock, but for the trial
that chooses an engine.
"""
