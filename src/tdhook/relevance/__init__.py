"""All that is LRP's: rules, the operations they reach, composites, plans, the ledger."""
