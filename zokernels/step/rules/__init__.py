"""What is done with the estimate sum_k g_k z_k: SGD, and rules with a state or a window."""
