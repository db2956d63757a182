//! What only this ledger has: the file, its lock, its schema, its batches. What both have is in the conformance suite.
