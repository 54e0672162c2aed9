//! The header of a packet (virtio 1.2 §5.10.6).

/// Bytes of a header in the ring.
pub(super) const HEADER_BYTES: usize = 44;
/// The host's context id.
pub(super) const CID_HOST: u64 = 2;
/// A stream socket, the only supported type.
pub(super) const TYPE_STREAM: u16 = 1;

/// The sender of the packet will receive no more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of the packet will send no more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both directions are shut down.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The operation of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::FromRepr)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) socket_type: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub(super) buf_alloc: u32,
    /// Free-running number of bytes that the sender has received and passed on.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            socket_type: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.socket_type.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        for field in fields {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        }
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (front, behind) = rest
        .split_first_chunk()
        .expect("the fields add up to the length of a header");
    *rest = behind;
    *front
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_lies_on_the_ring_as_the_specification_has_it() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 52,
            len: 0x2122_2324,
            socket_type: TYPE_STREAM,
            op: Op::Data as u16,
            flags: SHUTDOWN_BOTH,
            buf_alloc: 0x3132_3334,
            fwd_cnt: 0x4142_4344,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..24], [0x14, 0x13, 0x12, 0x11, 52, 0, 0, 0]);
        assert_eq!(bytes[28..36], [1, 0, 5, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[40..], [0x44, 0x43, 0x42, 0x41]);
        assert_eq!(Header::from_bytes(&bytes), header);
    }

    #[test]
    fn ops_are_numbered_from_1_to_7() {
        for number in 0..=9 {
            let known = Op::from_repr(number).map(|op| op as u16);
            assert_eq!(known, (1..=7).contains(&number).then_some(number));
        }
    }
}
