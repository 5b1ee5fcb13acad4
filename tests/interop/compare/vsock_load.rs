//! What vsock back ends are asked for by the driver: streams each way, questions and answers. No guest takes part.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use super::vsock_driver::{DATA, Driver, LARGEST, Ports, REQUEST, RESPONSE};
use crate::traffic::{dial, text};

/// MiB of a stream in one run.
const STREAM: u32 = 256;
/// Packets in one run; questions, their bytes, and connections on which they are asked at once.
const PACKETS: u32 = 200_000;
const QUESTIONS: u32 = 12_800;
const QUESTION: u32 = 64;
const CROWD: u32 = 32;
/// Packets of which the device is told together.
const TOGETHER: u32 = 8;
/// The host's port that the driver calls, and the guest's that the host does.
const HOST_PORT: u32 = 54;
const GUEST_PORT: u32 = 7001;

/// A back end with a driver.
pub struct Load {
    driver: Driver,
    uds: PathBuf,
    listener: UnixListener,
    /// The port of the next call.
    next: u32,
}

impl Load {
    pub fn new(socket: &Path, cid: u64, uds: &Path) -> Result<Self, String> {
        let listener = UnixListener::bind(format!("{}_{HOST_PORT}", uds.display())).map_err(text)?;
        Ok(Self { driver: Driver::new(socket, cid)?, uds: uds.to_owned(), listener, next: 9000 })
    }

    /// Answers the host's call.
    fn accept(&mut self) -> Result<Ports, String> {
        let ports = self.driver.expect(REQUEST)?.ports;
        self.driver.begin(ports);
        self.driver.send(ports, RESPONSE, 0);
        self.driver.flush();
        Ok(ports)
    }

    /// MiB a second from the host to the driver.
    pub fn down(&mut self) -> Result<f64, String> {
        let uds = self.uds.clone();
        let writer = thread::spawn(move || {
            let mut stream = dial(&uds, GUEST_PORT)?;
            let (bytes, begin) = (vec![0x5A; 1 << 20], Instant::now());
            (0..STREAM).try_for_each(|_| stream.write_all(&bytes)).map_err(text)?;
            // The driver ends the connection when all has come.
            let _end = stream.read(&mut [0]);
            Ok::<_, String>(begin)
        });
        let ports = self.accept()?;
        let mut left = u64::from(STREAM) << 20;
        while left > 0 {
            match self.driver.receive() {
                Some(packet) if packet.operation == DATA => left -= u64::from(packet.len),
                Some(_) => {}
                None => self.driver.sleep()?,
            }
        }
        let end = Instant::now();
        self.driver.end(ports);
        let begin = writer.join().map_err(|_| "panicked")??;
        Ok(f64::from(STREAM) / end.duration_since(begin).as_secs_f64())
    }

    /// Seconds in which the driver sends the host so many bytes by packets of this size.
    fn send(&mut self, all: u32, size: u32) -> Result<f64, String> {
        let listener = self.listener.try_clone().map_err(text)?;
        let reader = thread::spawn(move || {
            let (mut stream, _) = listener.accept().map_err(text)?;
            let (mut bytes, mut left) = (vec![0; 1 << 20], u64::from(all));
            while left > 0 {
                match stream.read(&mut bytes).map_err(text)? {
                    0 => return Err(format!("{left} bytes are missing")),
                    count => left -= count as u64,
                }
            }
            Ok(Instant::now())
        });
        self.next += 1;
        let ports = (self.next, HOST_PORT);
        self.driver.begin(ports);
        self.driver.send(ports, REQUEST, 0);
        self.driver.expect(RESPONSE)?;
        let begin = Instant::now();
        let (mut sent, mut packets) = (0, 0);
        while sent < all {
            let len = size.min(self.driver.credit(ports)).min(all - sent);
            if len > 0 && self.driver.send(ports, DATA, len) {
                sent += len;
                packets += 1;
                // Linux tells the device of all that its worker found waiting.
                if packets % TOGETHER == 0 {
                    self.driver.flush();
                }
            } else if self.driver.receive().is_none() {
                self.driver.sleep()?;
            }
            while self.driver.receive().is_some() {}
        }
        self.driver.flush();
        let end = reader.join().map_err(|_| "panicked")??;
        self.driver.end(ports);
        Ok(end.duration_since(begin).as_secs_f64())
    }

    /// MiB a second from the driver to the host, by packets of 64 KiB.
    pub fn up(&mut self) -> Result<f64, String> {
        Ok(f64::from(STREAM) / self.send(STREAM << 20, LARGEST)?)
    }

    /// Packets of 64 bytes a second from the driver to the host.
    pub fn packets(&mut self) -> Result<f64, String> {
        Ok(f64::from(PACKETS) / self.send(PACKETS * QUESTION, QUESTION)?)
    }

    /// Questions of the host a second, one after the other.
    pub fn questions(&mut self) -> Result<f64, String> {
        self.ask(1)
    }

    /// Questions of the host a second, one on each of many connections at any time.
    pub fn crowd(&mut self) -> Result<f64, String> {
        self.ask(CROWD)
    }

    /// Questions a second on so many connections, which the driver answers.
    fn ask(&mut self, connections: u32) -> Result<f64, String> {
        let uds = self.uds.clone();
        let (called, calls) = channel();
        let asker = thread::spawn(move || {
            let mut streams = Vec::new();
            for _ in 0..connections {
                streams.push(dial(&uds, GUEST_PORT)?);
                called.send(()).map_err(text)?;
            }
            let (begin, mut bytes) = (Instant::now(), [0x5A; QUESTION as usize]);
            for _ in 0..QUESTIONS / connections {
                streams.iter_mut().try_for_each(|stream| stream.write_all(&bytes)).map_err(text)?;
                streams.iter_mut().try_for_each(|stream| stream.read_exact(&mut bytes)).map_err(text)?;
            }
            Ok::<_, String>((begin.elapsed(), streams))
        });
        let mut all = Vec::new();
        for _ in 0..connections {
            all.push(self.accept()?);
            calls.recv().map_err(text)?;
        }
        let mut answered = 0;
        while answered < QUESTIONS / connections * connections * QUESTION {
            match self.driver.receive() {
                Some(packet) if packet.operation == DATA => {
                    self.driver.send(packet.ports, DATA, packet.len);
                    answered += packet.len;
                }
                Some(_) => {}
                None => self.driver.sleep()?,
            }
        }
        self.driver.flush();
        let (time, streams) = asker.join().map_err(|_| "panicked")??;
        all.into_iter().for_each(|ports| self.driver.end(ports));
        drop(streams);
        Ok(f64::from(QUESTIONS / connections * connections) / time.as_secs_f64())
    }
}
