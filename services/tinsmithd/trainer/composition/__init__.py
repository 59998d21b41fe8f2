"""How a batch is computed: which data in which micro-batch on which rank."""
