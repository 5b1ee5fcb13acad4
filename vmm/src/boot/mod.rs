//! Boot protocols.
