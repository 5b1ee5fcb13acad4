//! Log records of a jailed process.
