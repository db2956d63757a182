//! A model of the protocol for an exhaustive search: two holders, events, the ledger, the cache between them, cleanup, an
//! operator, and what can go wrong around them. Every interleaving of a small world is visited.
//!
//! What is real and what is modelled: the ledger decides by [`transition`](oncegate_sidecar::event::transition) and changes
//! events by [`apply`](oncegate_sidecar::event::apply), and the cache answers by its own
//! [`Entry`](oncegate_sidecar::cache::Entry), so the code itself is checked, not a copy of it. Only their surroundings are
//! modelled: that a ledger takes one step at a time (S1), that Redis writes by compare-and-set (C2), and which events Cleanup
//! may take. The judgement ([`history`]) keeps its own record and does not look at what the rules make of events.
//!
//! Faults: a call that was sent stays under way for ever, and arrives at any later time, any number of times, or never. Answers
//! get lost. Commits fail. Holders and the sidecar crash. Redis forgets everything, accepts a write late, or gets back what it
//! first had, which then verifies and never expires. A sidecar that answers from Redis knows what was replayed, or has not read
//! it yet. The database's clock moves at any moment, past every expiry.
//!
//! What it leaves out: how long a sidecar may go without reading what was replayed (its cache stops answering after two seconds
//! of that, C7), and forged values, which the MAC keeps out (C3).

pub mod broken;
pub mod history;
mod ledger;
mod protocol;
pub mod world;

pub use broken::Broken;
pub use protocol::Protocol;
