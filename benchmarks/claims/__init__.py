"""The paper's claims in miniature; `python -m benchmarks.claims --help` says what there is to run."""
