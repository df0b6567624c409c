"""Mixed-precision quantization of any network: cost, scores, allocation of bits, quantizers, deployment."""
