//! Ways to break the protocol on purpose. The search has to find each of them, or it cannot be trusted when it finds
//! nothing.

/// One rule that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// A Mark is accepted whatever its token is (S2).
    MarkIgnoresToken,
    /// Tokens are counted on the event's row (S2).
    TokenPerRow,
    /// A live lock is taken over (S5).
    GrantBeforeExpiry,
    /// The archive's claim ids are not checked (S4).
    ForgetsEndedClaims,
    /// The attempt that ends is not archived (S9).
    AttemptNotArchived,
    /// A resolution does not draw a token (C2).
    ResolutionKeepsToken,
    /// A completed event is replayed without force (I4).
    ReplayWithoutForce,
    /// A completion is cached before its commit (C2).
    CachedBeforeCommit,
    /// Redis takes every write, whatever token it holds (C2).
    CacheIgnoresToken,
    /// A resolution deletes the entry and leaves no tombstone (C2).
    DeleteInsteadOfTombstone,
    /// Entries in Redis are believed whatever was replayed since (C7).
    ForgetsReplays,
    /// Entries in Redis are believed however old they are (C7).
    EntriesLiveForEver,
    /// A caller that finds nothing in Redis is granted the lock there, and the ledger follows (C1).
    GrantFromCache,
    /// Cleanup takes events that somebody is working on.
    CleanupTakesOpen,
    /// Cleanup goes below the minimum retention (C2).
    CleanupUndercutsRetention,
}

impl Broken {
    /// All.
    pub const ALL: [Broken; 15] = [
        Broken::MarkIgnoresToken,
        Broken::TokenPerRow,
        Broken::GrantBeforeExpiry,
        Broken::ForgetsEndedClaims,
        Broken::AttemptNotArchived,
        Broken::ResolutionKeepsToken,
        Broken::ReplayWithoutForce,
        Broken::CachedBeforeCommit,
        Broken::CacheIgnoresToken,
        Broken::DeleteInsteadOfTombstone,
        Broken::ForgetsReplays,
        Broken::EntriesLiveForEver,
        Broken::GrantFromCache,
        Broken::CleanupTakesOpen,
        Broken::CleanupUndercutsRetention,
    ];
}
