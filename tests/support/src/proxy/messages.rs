//! The bytes of a connection as messages (PostgreSQL's documentation, "Message Formats").

/// The code of a CancelRequest, in the place of the protocol's version.
const CANCEL: u32 = 80_877_102;
/// Those of the questions whether the server encrypts: SSLRequest and GSSENCRequest.
const ENCRYPTION: [u32; 2] = [80_877_103, 80_877_104];

/// One side's bytes, that become messages.
#[derive(Default)]
pub(super) struct Messages {
    bytes: Vec<u8>,
    /// The next message is a client's first, which has no type.
    untyped: bool,
}

impl Messages {
    /// Those of a client, that begin with the login or a request to cancel.
    pub(super) fn of_client() -> Self {
        Self {
            untyped: true,
            ..Self::default()
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// All that is there, as if it were one message.
    pub(super) fn take_all(&mut self) -> Option<Message> {
        let bytes = std::mem::take(&mut self.bytes);
        (!bytes.is_empty()).then_some(Message {
            bytes,
            typed: false,
        })
    }

    /// The next message, if all of it is there.
    pub(super) fn next(&mut self) -> Option<Message> {
        let typed = usize::from(!self.untyped);
        let length = self.bytes.get(typed..typed + 4)?.try_into().ok()?;
        let length = typed + usize::try_from(u32::from_be_bytes(length)).ok()?;
        if self.bytes.len() < length {
            return None;
        }
        let rest = self.bytes.split_off(length);
        let message = Message {
            bytes: std::mem::replace(&mut self.bytes, rest),
            typed: !self.untyped,
        };
        // After the answer about encryption the login is still to come.
        self.untyped = message.asks_for_encryption();
        Some(message)
    }
}

/// One message, whole.
pub(super) struct Message {
    pub(super) bytes: Vec<u8>,
    typed: bool,
}

impl Message {
    /// Its type; `None` for a client's first.
    pub(super) fn kind(&self) -> Option<u8> {
        self.bytes.first().copied().filter(|_| self.typed)
    }

    /// Whether the server answers it with a ReadyForQuery: a login, a simple query, a Sync.
    pub(super) fn asks_for_an_answer(&self) -> bool {
        match self.kind() {
            Some(kind) => matches!(kind, b'Q' | b'S'),
            None => !self.is_cancel() && !self.asks_for_encryption(),
        }
    }

    /// The end of an answer.
    pub(super) fn is_ready_for_query(&self) -> bool {
        self.kind() == Some(b'Z')
    }

    /// The backend that a BackendKeyData names.
    pub(super) fn backend(&self) -> Option<i32> {
        let pid = self.bytes.get(5..9).filter(|_| self.kind() == Some(b'K'))?;
        pid.try_into().ok().map(i32::from_be_bytes)
    }

    pub(super) fn is_cancel(&self) -> bool {
        self.code() == Some(CANCEL)
    }

    /// Whether it is answered by one byte, which is no message.
    pub(super) fn asks_for_encryption(&self) -> bool {
        self.code().is_some_and(|code| ENCRYPTION.contains(&code))
    }

    /// What stands in the place of the protocol's version in a client's first message.
    fn code(&self) -> Option<u32> {
        let code = self.bytes.get(4..8).filter(|_| !self.typed)?;
        code.try_into().ok().map(u32::from_be_bytes)
    }

    /// The SQL of a simple query or of a statement that is prepared, and the type of any other message.
    pub(super) fn text(&self) -> String {
        let text = match self.kind() {
            Some(b'Q') => self.bytes.get(5..self.bytes.len() - 1),
            // Behind the statement's name.
            Some(b'P') => self
                .bytes
                .get(5..)
                .and_then(|body| body.split(|byte| *byte == 0).nth(1)),
            Some(_) => self.bytes.get(..1),
            None => None,
        };
        String::from_utf8_lossy(text.unwrap_or_default()).into_owned()
    }
}
