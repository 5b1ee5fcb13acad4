//! PIIX3 function 0, 00:01.0: PIRQ routing, X-bus chip selects, reset control (290550, section 2.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::super::host::{Host, PowerEvent, ResetSource, Space};
use super::super::irq::InterruptRouter;
use super::super::pci::{
    ConfigError, ConfigSpace, ConfigSpaceBuilder, Identity, PciFunction, Register, Window, header,
};
use super::super::tree::Topology;
use super::{RESET_CONTROL_PORT, ResetControl};

/// X-bus chip select register.
const XBCS: u16 = 0x4E;
/// XBCS bit 0: chip select for the RTC, ports 70–77.
const XBCS_RTC: u8 = 1 << 0;
/// XBCS bit 1: chip select for the keyboard controller, ports 60 and 64.
const XBCS_KEYBOARD: u8 = 1 << 1;
/// PIRQ route control, PIRQA# first.
pub(in super::super) const PIRQRC: u16 = 0x60;

/// The registers beyond the header: offset, value after reset, writable bits.
pub(in super::super) const REGISTERS: [Register; 10] = [
    // IORT: ISA I/O recovery timer.
    Register { offset: 0x4C, reset: &[0x4D], writable: &[0xFF] },
    // XBCS
    Register { offset: XBCS, reset: &[0x03], writable: &[0xF7, 0x01] },
    // PIRQRC A–D: bit 7 off, bits 0–3 the IRQ.
    Register { offset: PIRQRC, reset: &[0x80; 4], writable: &[0x8F; 4] },
    // TOM: top of memory for ISA masters. MSTAT: retry, EXTSMI# mode, USB, ISA clock divisor; its bit 15 is cleared by ones.
    Register { offset: 0x69, reset: &[0x02], writable: &[0xFE, 0xD1] },
    // MBIRQ0
    Register { offset: 0x70, reset: &[0x80], writable: &[0xEF] },
    // MBDMA0–1: type F and the channel; bit 3 is the PIIX's alone and stays as it is. PCSC: programmable chip select.
    Register { offset: 0x76, reset: &[0x0C, 0x0C, 0x02], writable: &[0x87, 0x87, 0xFF, 0xFF] },
    // APICBASE; DLC.
    Register { offset: 0x80, reset: &[], writable: &[0x7F, 0x00, 0x0F] },
    // SMICNTL, SMIEN, SEE (IRQs 15–0 but 2; APIC, NMI, INTR, SMI), FTMR: there is no SMI. SMIREQ, which follows, has nothing
    // to tell: software can only clear its bits.
    Register { offset: 0xA0, reset: &[0x08], writable: &[0x1F, 0, 0xFF, 0x01, 0xFB, 0xFF, 0x00, 0xF0, 0xFF] },
    Register { offset: 0xA8, reset: &[0x0F], writable: &[] },
    // CTLTMR, CTHTMR: clock throttling.
    Register { offset: 0xAC, reset: &[], writable: &[0xFF, 0, 0xFF] },
];

/// The function.
pub(in super::super) struct IsaBridge {
    config: ConfigSpace,
    reset_control: ResetControl,
    /// XBCS, as [`forwards`](Self::forwards) needs it.
    chip_selects: AtomicU8,
    host: Arc<dyn Host>,
    router: Arc<InterruptRouter>,
    topology: Arc<Topology>,
}

impl IsaBridge {
    pub(in super::super) fn new(
        host: Arc<dyn Host>,
        router: Arc<InterruptRouter>,
        topology: Arc<Topology>,
    ) -> Result<Self, ConfigError> {
        let mut builder = ConfigSpaceBuilder::new(Identity {
            vendor: 0x8086,
            device: 0x7000,
            revision: 0x00,
            class: 0x06_01_00,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        });
        // PCICMD: always I/O, memory and bus master; special cycle and SERR# enable can be written. PCISTS: medium DEVSEL#.
        builder.register(header::COMMAND, &0x0007_u16.to_le_bytes(), &0x0108_u16.to_le_bytes())?;
        builder.register(header::STATUS, &0x0200_u16.to_le_bytes(), &[])?;
        builder.write_one_to_clear(header::STATUS, &0x7800_u16.to_le_bytes())?;
        builder.register(header::CACHE_LINE_SIZE, &[0, 0], &[0, 0])?;
        builder.register(header::HEADER_TYPE, &[0x80], &[0])?;
        builder.register(header::INTERRUPT_LINE, &[0], &[0])?;
        builder.registers(&REGISTERS)?;
        // MSTAT bit 15: SERR# for a delayed transaction that timed out.
        builder.write_one_to_clear(0x6B, &[0x80])?;
        let config = builder.build();
        let chip_selects = AtomicU8::new(config.get_u8(XBCS));
        Ok(Self { config, reset_control: ResetControl::default(), chip_selects, host, router, topology })
    }

    /// Whether an ISA cycle at `port` gets the chip select that its device needs.
    pub(super) fn forwards(&self, port: u16) -> bool {
        let needed = match port {
            0x60 | 0x64 => XBCS_KEYBOARD,
            0x70..=0x77 => XBCS_RTC,
            _ => 0,
        };
        self.chip_selects.load(Ordering::Acquire) & needed == needed
    }

    /// Makes what hangs on the registers follow them.
    fn follow(&self) {
        let mut routes = [0; 4];
        self.config.read(PIRQRC, &mut routes);
        self.router.set_routes(routes);
        let selects = self.config.get_u8(XBCS);
        if self.chip_selects.swap(selects, Ordering::AcqRel) != selects {
            self.topology.changed();
        }
    }
}

impl PciFunction for IsaBridge {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_written(&self, _offset: u16, _len: usize) {
        self.follow();
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window { id: 0, space: Space::Port, address: RESET_CONTROL_PORT, length: 1 }]
    }

    fn window_read(&self, _window: u8, _offset: u64, data: &mut [u8]) {
        data.fill(self.reset_control.read());
    }

    fn window_write(&self, _window: u8, _offset: u64, data: &[u8]) {
        if let [value] = data
            && self.reset_control.write(*value)
        {
            self.host.power(PowerEvent::Reset(ResetSource::ResetControl));
        }
    }

    fn reset(&self) {
        self.reset_control.reset();
        self.follow();
    }
}
