"""Names of what attention keeps for its backward pass, by which a rematerialization policy keeps it too."""

OUT = "attention_out"  # [B,T,N,H]
LSE = "attention_lse"  # float32, log-sum-exp of each query's scores
