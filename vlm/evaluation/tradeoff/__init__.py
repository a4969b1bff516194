"""What search structures trade: recall, time and memory, measured beside plain FAISS."""
