"""What a frozen encoder's features tell apart: kNN and linear probes, effective rank, verification."""
