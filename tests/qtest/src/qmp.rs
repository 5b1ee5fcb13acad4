//! As much of QMP as a test needs that only looks at registers: the greeting, the handshake, a few queries, reset and quit.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// What a command asks of the rest of the program.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// End with success.
    Quit,
    /// Reset the machine.
    Reset,
    /// Press the power button.
    PowerButton,
}

/// One QMP session.
#[derive(Debug)]
pub struct Qmp {
    negotiated: bool,
    /// The run state, as `query-status` tells it.
    status: &'static str,
    /// What came of a document that is not complete yet.
    partial: Vec<u8>,
}

const COMMANDS: [&str; 11] = [
    "cont",
    "qmp_capabilities",
    "query-commands",
    "query-machines",
    "query-name",
    "query-status",
    "query-version",
    "quit",
    "stop",
    "system_powerdown",
    "system_reset",
];

fn line(value: &Value) -> String {
    format!("{value}\r\n")
}

fn error(class: &str, sentence: &str, id: Option<&Value>) -> Value {
    let mut reply = json!({ "error": { "class": class, "desc": sentence } });
    add_id(&mut reply, id);
    reply
}

/// A command's id comes back with its reply.
fn add_id(reply: &mut Value, id: Option<&Value>) {
    if let (Some(reply), Some(id)) = (reply.as_object_mut(), id) {
        reply.insert("id".into(), id.clone());
    }
}

fn version() -> Value {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    json!({
        "qemu": {
            "major": part(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": part(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": part(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": "Bulkhead",
    })
}

impl Qmp {
    /// A session in which nothing has been said; the machine is held by `-S` or runs.
    pub fn new(stopped: bool) -> Self {
        let status = if stopped { "prelaunch" } else { "running" };
        Self { negotiated: false, status, partial: Vec::new() }
    }

    /// What is sent first.
    pub fn greeting() -> String {
        line(&json!({ "QMP": { "version": version(), "capabilities": [] } }))
    }

    /// Sets the run state.
    pub fn set_status(&mut self, status: &'static str) {
        self.status = status;
    }

    /// An event, if the client is ready for events.
    pub fn event(&self, name: &str, data: Option<Value>) -> String {
        if !self.negotiated {
            return String::new();
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
        let mut event = json!({ "event": name, "timestamp": timestamp });
        if let (Some(event), Some(data)) = (event.as_object_mut(), data) {
            event.insert("data".into(), data);
        }
        line(&event)
    }

    /// Takes bytes of the client; returns what to send and what to do. Documents need no line ends between them.
    pub fn receive(&mut self, bytes: &[u8]) -> (String, Vec<Effect>) {
        self.partial.extend_from_slice(bytes);
        let (mut text, mut effects) = (String::new(), Vec::new());
        let received = std::mem::take(&mut self.partial);
        let mut documents = serde_json::Deserializer::from_slice(&received).into_iter::<Value>();
        loop {
            let before = documents.byte_offset();
            match documents.next() {
                None => break,
                Some(Ok(document)) => {
                    let (reply, effect) = self.execute(&document);
                    text.push_str(&reply);
                    effects.extend(effect);
                }
                Some(Err(failure)) if failure.is_eof() => {
                    self.partial = received.get(before..).unwrap_or_default().to_vec();
                    break;
                }
                // Where the next document begins is anybody's guess: the rest is dropped.
                Some(Err(failure)) => {
                    text.push_str(&line(&error(
                        "GenericError",
                        &format!("JSON parse error, {failure}"),
                        None,
                    )));
                    break;
                }
            }
        }
        (text, effects)
    }

    fn execute(&mut self, document: &Value) -> (String, Option<Effect>) {
        let id = document.get("id");
        let Some(name) = document.get("execute").and_then(Value::as_str) else {
            return (line(&error("GenericError", "QMP input lacks member 'execute'", id)), None);
        };
        let value = match (name, self.negotiated) {
            ("qmp_capabilities", false) => {
                self.negotiated = true;
                Some(json!({}))
            }
            (_, false) => {
                let sentence = "Expecting capabilities negotiation with 'qmp_capabilities'";
                return (line(&error("CommandNotFound", sentence, id)), None);
            }
            ("qmp_capabilities", true) => {
                let sentence = "Capabilities negotiation is already complete, command ignored";
                return (line(&error("CommandNotFound", sentence, id)), None);
            }
            _ => self.query(name),
        };
        let Some(value) = value else {
            let sentence = format!("The command {name} has not been found");
            return (line(&error("CommandNotFound", &sentence, id)), None);
        };
        let mut reply = json!({ "return": value });
        add_id(&mut reply, id);
        let effect = match name {
            "quit" => Some(Effect::Quit),
            "system_reset" => Some(Effect::Reset),
            "system_powerdown" => Some(Effect::PowerButton),
            _ => None,
        };
        (line(&reply), effect)
    }

    /// What a command returns.
    fn query(&mut self, name: &str) -> Option<Value> {
        match name {
            "stop" => self.status = "paused",
            "cont" => self.status = "running",
            _ => {}
        }
        Some(match name {
            "query-version" => version(),
            "query-name" => json!({}),
            "query-status" => {
                json!({ "status": self.status, "running": self.status == "running", "singlestep": false })
            }
            "query-commands" => COMMANDS.iter().map(|name| json!({ "name": name })).collect(),
            "query-machines" => json!([{
                "name": "pc", "is-default": true, "cpu-max": 4096, "hotpluggable-cpus": false,
                "numa-mem-supported": false, "deprecated": false,
            }]),
            "quit" | "stop" | "cont" | "system_reset" | "system_powerdown" => json!({}),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(qmp: &mut Qmp, text: &str) -> (Vec<Value>, Vec<Effect>) {
        let (reply, effects) = qmp.receive(text.as_bytes());
        (reply.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), effects)
    }

    #[test]
    fn nothing_goes_before_the_handshake() {
        let mut qmp = Qmp::new(false);
        let (replies, _) = say(&mut qmp, r#"{"execute":"query-status","id":7}"#);
        assert_eq!(replies[0]["error"]["class"], "CommandNotFound");
        assert_eq!(replies[0]["id"], 7);
        assert_eq!(qmp.event("RESET", None), "");
        say(&mut qmp, r#"{"execute":"qmp_capabilities"}"#);
        assert_eq!(say(&mut qmp, r#"{"execute":"query-status"}"#).0[0]["return"]["status"], "running");
        assert!(qmp.event("RESET", None).contains("timestamp"));
    }

    #[test]
    fn documents_may_come_in_pieces_and_together() {
        let mut qmp = Qmp::new(true);
        assert_eq!(say(&mut qmp, r#"{"execute":"qmp_capab"#).0.len(), 0);
        let (replies, effects) = say(&mut qmp, r#"ilities"}{"execute":"system_reset"} {"execute":"quit"}"#);
        assert_eq!(replies.len(), 3);
        assert_eq!(effects, [Effect::Reset, Effect::Quit]);
    }

    #[test]
    fn what_is_not_known_is_an_error_and_the_session_goes_on() {
        let mut qmp = Qmp::new(false);
        say(&mut qmp, r#"{"execute":"qmp_capabilities"}"#);
        let (replies, _) = say(&mut qmp, r#"{"execute":"blockdev-add"}"#);
        assert_eq!(replies[0]["error"]["desc"], "The command blockdev-add has not been found");
        assert_eq!(say(&mut qmp, "}}}\n").0[0]["error"]["class"], "GenericError");
        assert_eq!(say(&mut qmp, r#"{"execute":"query-status"}"#).0[0]["return"]["running"], true);
    }
}
