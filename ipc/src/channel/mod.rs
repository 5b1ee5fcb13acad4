//! Control messages between the supervisor and its processes.
