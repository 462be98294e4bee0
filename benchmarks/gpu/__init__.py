"""What rmoe costs on a GPU, and whether it computes there what it computes elsewhere: `python -m benchmarks.gpu`."""
