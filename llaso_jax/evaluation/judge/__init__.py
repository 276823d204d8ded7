"""Who judges free answers: published scores, a language model, or an offline surrogate of one."""
