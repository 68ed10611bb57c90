"""Names of attention's residuals, by which a rematerialisation policy keeps them."""

OUT, LSE = "attention_out", "attention_lse"
