//! `bulkhead stop` and `bulkhead resume`.

use std::time::Duration;

use super::api::client::{ClientError, Connection};
use super::api::{Request, Response};
use super::cli::{ResumeArgs, StopArgs};

/// How long a machine may take to end when all its processes were killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(15);

/// Stops a machine. False when it still ran after the time that the user gave it.
pub fn stop(args: &StopArgs) -> Result<bool, ClientError> {
    let connection = Connection::to_name(&args.name)?;
    let (request, timeout) = if args.force {
        (Request::Kill, KILL_TIMEOUT)
    } else {
        (Request::Stop, Duration::from_secs(args.timeout.into()))
    };
    match connection.ask(&request, None) {
        // It may be gone before its answer is.
        Ok(_) | Err(ClientError::Ended) => {}
        Err(error) => return Err(error),
    }
    if timeout.is_zero() { Ok(true) } else { connection.wait_for_end(timeout) }
}

/// Lets a machine go on that its watchdog has paused.
pub fn resume(args: &ResumeArgs) -> Result<(), ClientError> {
    match Connection::to_name(&args.name)?.ask(&Request::Resume, None)? {
        Response::Done => Ok(()),
        other => Err(ClientError::Answer(format!("{other:?}"))),
    }
}
