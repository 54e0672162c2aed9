//! A driver that connects to a program of the host, and accepts a connection from one.

use crate::memory::{read, write};
use crate::queue::{DESC_WRITE, Desc, Queue};
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1};

const TYPE_VSOCK: u16 = 19;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CID_HOST: u64 = 2;
const TYPE_STREAM: u16 = 1;

// Operations (virtio 1.2 §5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
/// Neither side sends any more.
const SHUTDOWN_BOTH: u32 = 3;

const HEADER_BYTES: u64 = 44;
/// A packet that is sent.
const SENT: u64 = 48 << 20;
/// Buffers for packets that are received.
const RECEIVED: u64 = 49 << 20;
const BUFFER_BYTES: u32 = 4096;
const BUFFERS: u16 = 16;
/// This guest's buffer size.
const ROOM: u32 = 64 << 10;

/// Port of the host's program.
const HOST_PORT: u32 = 1024;
/// Port on which this guest listens.
const GUEST_PORT: u32 = 52;

struct Driver {
    device: Device,
    receive: Queue,
    transmit: Queue,
    cid: u64,
}

/// A received packet: its operation, the host's port and the location of its data.
struct Packet {
    op: u16,
    host_port: u32,
    data: u64,
    bytes: u32,
}

impl Driver {
    fn start() -> Option<Self> {
        let device = Device::find(TYPE_VSOCK)?;
        if !device.negotiate(F_VERSION_1) {
            return None;
        }
        let receive = device.setup_queue(RECEIVE)?;
        let transmit = device.setup_queue(TRANSMIT)?;
        device.driver_ok();
        let low: u32 = read(device.config);
        let high: u32 = read(device.config + 4);
        let mut driver = Self {
            device,
            receive,
            transmit,
            cid: u64::from(low) | u64::from(high) << 32,
        };
        for index in 0..BUFFERS {
            driver.offer(index);
        }
        Some(driver)
    }

    fn offer(&mut self, index: u16) {
        let desc = Desc {
            address: RECEIVED + u64::from(index) * u64::from(BUFFER_BYTES),
            bytes: BUFFER_BYTES,
            flags: DESC_WRITE,
            next: 0,
        };
        self.receive.set_desc(index, desc);
        self.receive.offer(index);
        self.device.kick(RECEIVE);
    }

    /// Sends a packet; false if the device does not accept it.
    fn send(&mut self, ports: (u32, u32), op: u16, flags: u32, data: &[u8]) -> bool {
        let (guest, host) = ports;
        write(SENT, self.cid);
        write(SENT + 8, CID_HOST);
        write(SENT + 16, guest);
        write(SENT + 20, host);
        write(SENT + 24, data.len() as u32);
        write(SENT + 28, TYPE_STREAM);
        write(SENT + 30, op);
        write(SENT + 32, flags);
        write(SENT + 36, ROOM);
        write(SENT + 40, 0u32);
        for (at, byte) in (SENT + HEADER_BYTES..).zip(data) {
            write(at, *byte);
        }
        let bytes = HEADER_BYTES as u32 + data.len() as u32;
        self.transmit.set_chain(&[(SENT, bytes)], 0);
        self.transmit.offer(0);
        self.device.kick(TRANSMIT);
        self.transmit.wait_used().is_some()
    }

    /// The next packet. Each buffer is used once.
    fn next(&mut self) -> Option<Packet> {
        let (index, _) = self.receive.wait_used()?;
        let at = RECEIVED + u64::from(index) * u64::from(BUFFER_BYTES);
        Some(Packet {
            op: read(at + 30),
            host_port: read(at + 16),
            data: at + HEADER_BYTES,
            bytes: read(at + 24),
        })
    }

    /// As [`Driver::next`], but waits without a limit, because a program of the host must act first.
    fn wait(&mut self) -> Packet {
        loop {
            if let Some(packet) = self.next() {
                return packet;
            }
        }
    }
}

impl Packet {
    fn says(&self, text: &[u8]) -> bool {
        self.op == DATA
            && self.bytes as usize == text.len()
            && (self.data..)
                .zip(text)
                .all(|(at, byte)| read::<u8>(at) == *byte)
    }
}

pub fn scenario(report: &mut Report) {
    let Some(mut driver) = Driver::start() else {
        return report.fail("vsock", format_args!("does not start"));
    };
    let cid = driver.cid;
    report.check("vsock_cid", cid == 3, format_args!("{cid}"));

    let ports = (7, HOST_PORT);
    driver.send(ports, REQUEST, 0, &[]);
    let op = driver.wait().op;
    report.check("vsock_host_accepts", op == RESPONSE, format_args!("{op}"));
    driver.send(ports, DATA, 0, b"ping");
    let pong = driver.wait();
    report.check(
        "vsock_answer",
        pong.says(b"pong"),
        format_args!("{}", pong.op),
    );
    driver.send(ports, SHUTDOWN, SHUTDOWN_BOTH, &[]);
    let op = driver.wait().op;
    report.check("vsock_shutdown", op == RESET, format_args!("{op}"));

    // The host connects, and closes the connection when it has read everything.
    let request = driver.wait();
    report.check(
        "vsock_guest_is_asked",
        request.op == REQUEST,
        format_args!("{}", request.op),
    );
    let ports = (GUEST_PORT, request.host_port);
    driver.send(ports, RESPONSE, 0, &[]);
    driver.send(ports, DATA, 0, b"hello");
    let op = driver.wait().op;
    report.check("vsock_host_closes", op == SHUTDOWN, format_args!("{op}"));
    driver.send(ports, RESET, 0, &[]);
}
