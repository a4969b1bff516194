"""The scans on NVIDIA GPUs: compiled by NVRTC at first use, launched through the driver, tried before use."""
