"""The method: core + residual arithmetic, the gate, the exchange between processes, the layer."""
