//! fw_cfg: its ports, and DMA requests that the guest wrote.

use bulkhead_ipc::memory::Direction;
use bulkhead_vmm::machine::Space;

use crate::machine::{RAM, new_machine};
use crate::script::Script;

const SELECTOR: u64 = 0x510;
const DMA: u64 = 0x514;

/// Selects, reads and writes through the ports, places requests in RAM and starts them.
pub fn fw_cfg(input: &[u8]) {
    let Some((ram, machine)) = new_machine() else { return };
    let mut script = Script(input);
    for _ in 0..100 {
        if !script.goes_on() {
            return;
        }
        let operation = script.u8();
        let port = SELECTOR + u64::from(operation >> 4);
        match operation & 3 {
            0 => machine.write(Space::Port, SELECTOR, &script.u16().to_le_bytes()),
            1 => machine.read(Space::Port, port, &mut vec![0; usize::from(operation >> 2 & 3) + 1]),
            2 => {
                let data = script.bytes(usize::from(operation >> 2 & 3) + 1);
                machine.write(Space::Port, port, data);
            }
            _ => {
                // Control, length and address; the request itself lies anywhere, often in RAM.
                let at = if operation & 4 == 0 { u64::from(script.u32()) % (RAM + 8) } else { script.u64() };
                if let Ok(view) = ram.view(at, 16, Direction::Write) {
                    let mut request = [0; 16];
                    for (to, from) in request.iter_mut().zip(script.bytes(16)) {
                        *to = *from;
                    }
                    assert!(view.write_bytes(0, &request).is_ok());
                }
                let [a, b, c, d, low @ ..] = at.to_be_bytes();
                machine.write(Space::Port, DMA, &[a, b, c, d]);
                machine.write(Space::Port, DMA + 4, &low);
            }
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let dma = |control: u32, length: u32, address: u64| {
        let mut script = vec![3];
        script.extend(0x1000_u32.to_le_bytes());
        script.extend(control.to_be_bytes());
        script.extend(length.to_be_bytes());
        script.extend(address.to_be_bytes());
        script
    };
    vec![
        vec![0, 0, 0, 0x11, 0x11, 0x11, 0, 0x19, 0, 0x1D, 0x1D],
        dma(0x19 << 16 | 0b1010, 256, 0x2000),
        [dma(0x20 << 16 | 0b1010, 20, 0x1008), dma(0b10, u32::MAX, 0), dma(0b100, u32::MAX, 0)].concat(),
        [dma(0x21 << 16 | 0b1_1000, 16, RAM - 4), dma(0b10, 0x400_0000, 0x3000)].concat(),
    ]
}
