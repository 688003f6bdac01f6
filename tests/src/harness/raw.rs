//! AMQP's basic properties byte by byte, for what no client library would write.

/// A field table's entries, or a field array's values, already encoded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fields(pub(crate) Vec<u8>);

impl Fields {
    /// Adds an entry of a table.
    pub(crate) fn with(mut self, name: impl AsRef<[u8]>, value: Vec<u8>) -> Self {
        self.0.extend(short(name.as_ref()));
        self.0.extend(value);
        self
    }
}

/// Properties in the order of AMQP's flags.
#[derive(Debug, Clone, Default)]
pub(crate) struct RawProperties {
    fields: [Option<Vec<u8>>; 14],
}

/// Where a property stands in AMQP's order.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    ContentType = 0,
    ContentEncoding = 1,
    CorrelationId = 5,
    ReplyTo = 6,
    MessageId = 8,
    Type = 10,
    AppId = 12,
    ClusterId = 13,
}

impl RawProperties {
    /// A property that is a short string; of any bytes.
    pub(crate) fn text(&mut self, place: Place, bytes: impl AsRef<[u8]>) {
        self.fields[place as usize] = Some(short(bytes.as_ref()));
    }

    /// Takes a property away.
    pub(crate) fn without(&mut self, place: Place) {
        self.fields[place as usize] = None;
    }

    pub(crate) fn headers(&mut self, fields: &Fields) {
        let length = u32::try_from(fields.0.len()).expect("less than a frame").to_be_bytes();
        self.fields[2] = Some([&length[..], &fields.0].concat());
    }

    pub(crate) fn priority(&mut self, priority: u8) {
        self.fields[4] = Some(vec![priority]);
    }

    pub(crate) fn timestamp(&mut self, seconds: u64) {
        self.fields[9] = Some(seconds.to_be_bytes().to_vec());
    }

    /// Flags and properties as hex, for the foreign client.
    pub(crate) fn hex(&self) -> String {
        let flags = self.fields.iter().enumerate().filter(|(_, field)| field.is_some());
        let flags = flags.fold(0_u16, |flags, (place, _)| flags | 0x8000 >> place);
        let fields = self.fields.iter().flatten().flatten().copied();
        hex(&flags.to_be_bytes().into_iter().chain(fields).collect::<Vec<_>>())
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn short(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).expect("a short string")], bytes].concat()
}

/// Field values: a type and what belongs to it.
pub(crate) fn long_text(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    nested(b'S', bytes.as_ref())
}

/// A table (`F`), array (`A`), text (`S`) or byte array (`x`).
pub(crate) fn nested(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("less than a frame").to_be_bytes();
    [&[kind], &length[..], bytes].concat()
}

pub(crate) fn int(number: i64) -> Vec<u8> {
    [&b"l"[..], &number.to_be_bytes()].concat()
}

pub(crate) fn double(number: f64) -> Vec<u8> {
    [&b"d"[..], &number.to_be_bytes()].concat()
}

pub(crate) fn boolean(truth: bool) -> Vec<u8> {
    vec![b't', u8::from(truth)]
}
