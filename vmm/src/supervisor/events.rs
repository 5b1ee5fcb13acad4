//! `bulkhead events`: what happened to the processes of a machine, as JSON lines.

use std::io::{self, Write};

use super::api::client::{ClientError, Connection};
use super::api::{Request, Response};
use super::cli::EventsArgs;

/// Prints the events that the machine has kept, and with `--follow` those that come until it has ended.
pub fn events(args: &EventsArgs) -> Result<(), ClientError> {
    let connection = Connection::to_name(&args.name)?;
    let mut response = connection.ask(&Request::Events { follow: args.follow }, None)?;
    loop {
        let Response::Events { events, more } = response else {
            return Err(ClientError::Answer(format!("{response:?}")));
        };
        let mut stdout = io::stdout().lock();
        for event in events {
            let line =
                serde_json::to_string(&event).map_err(|error| ClientError::Answer(error.to_string()))?;
            // `bulkhead events | head` is no error.
            if writeln!(stdout, "{line}").is_err() {
                return Ok(());
            }
        }
        if stdout.flush().is_err() || !more && !args.follow {
            return Ok(());
        }
        drop(stdout);
        response = match connection.next_packet() {
            Err(ClientError::Ended) if args.follow => return Ok(()),
            other => other?,
        };
    }
}
