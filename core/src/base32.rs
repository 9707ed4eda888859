//! The store's own base-32 ("nix32"): 32 characters without `e o t u`, most significant first.
//!
//! The text is the number whose least significant byte is the first byte of the input, so the
//! first character stands for the top bits of the *last* byte. Source: formats, section 1.1.
#![expect(clippy::indexing_slicing, reason = "a byte is below 256, and five bits are below 32")]

/// Digit values 0 to 31.
pub const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

const NONE: u8 = 0xff;

/// Value of each byte as a digit, [`NONE`] where it is not one.
const VALUES: [u8; 256] = {
    let mut table = [NONE; 256];
    let mut value = 0;
    while value < 32 {
        table[ALPHABET[value as usize] as usize] = value;
        value += 1;
    }
    table
};

/// What is wrong with a base-32 text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Base32Error {
    #[error("base-32 text has '{}' at position {at}, which the alphabet lacks", char::from(*bad).escape_default())]
    Alphabet { bad: u8, at: usize },
    #[error("base-32 text has {found} characters, {bytes} bytes need {}", encoded_len(*bytes))]
    Length { found: usize, bytes: usize },
    #[error("base-32 text has bits set beyond its {bytes} bytes")]
    Overflow { bytes: usize },
}

/// Number of characters for `bytes` bytes: 20 gives 32, 32 gives 52.
pub const fn encoded_len(bytes: usize) -> usize {
    (bytes * 8).div_ceil(5)
}

/// Is this byte a digit?
pub const fn is_digit(byte: u8) -> bool {
    VALUES[byte as usize] != NONE
}

/// The value of a digit, 0 to 31.
pub const fn digit_value(byte: u8) -> Option<u8> {
    match VALUES[byte as usize] {
        NONE => None,
        value => Some(value),
    }
}

/// The digit for the lowest five bits of a number.
pub(crate) const fn digit(bits: u64) -> u8 {
    ALPHABET[(bits & 31) as usize]
}

/// The text form of `bytes`.
///
/// ```
/// assert_eq!(larder_core::base32::encode(&[0x1f, 0x00]), "000z");
/// ```
pub fn encode(bytes: &[u8]) -> String {
    let mut text = vec![0; encoded_len(bytes.len())];
    // Lowest digit last. Five bytes are eight digits, and share none with the next five.
    let mut places = text.iter_mut().rev();
    for five in bytes.chunks(5) {
        let mut bits = five.iter().rev().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        for place in places.by_ref().take(encoded_len(five.len())) {
            *place = digit(bits);
            bits >>= 5;
        }
    }
    String::from_utf8(text).expect("the alphabet is ASCII")
}

/// Decodes exactly `N` bytes.
pub fn decode<const N: usize>(text: &[u8]) -> Result<[u8; N], Base32Error> {
    let mut out = [0; N];
    decode_into(text, &mut out)?;
    Ok(out)
}

/// Decodes into `out`, whose length the text must match.
pub fn decode_into(text: &[u8], out: &mut [u8]) -> Result<(), Base32Error> {
    let bytes = out.len();
    if text.len() != encoded_len(bytes) {
        return Err(Base32Error::Length { found: text.len(), bytes });
    }
    out.fill(0);
    for (k, &c) in text.iter().rev().enumerate() {
        let Some(value) = digit_value(c) else {
            return Err(Base32Error::Alphabet { bad: c, at: text.len() - 1 - k });
        };
        let (i, j) = (k * 5 / 8, k * 5 % 8);
        let wide = u16::from(value) << j;
        let [low, high] = wide.to_le_bytes();
        if let Some(b) = out.get_mut(i) {
            *b |= low;
        }
        match out.get_mut(i + 1) {
            Some(b) => *b |= high,
            None if high != 0 => return Err(Base32Error::Overflow { bytes }),
            None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decode_undoes_encode(bytes in proptest::collection::vec(any::<u8>(), 0..70)) {
            let text = encode(&bytes);
            let mut back = vec![0; bytes.len()];
            decode_into(text.as_bytes(), &mut back).unwrap();
            prop_assert_eq!(back, bytes);
        }

        /// Each text has one value: what decodes encodes to the same text.
        #[test]
        fn encode_undoes_decode(text in "[0-9a-df-np-sv-z]{52}") {
            if let Ok(bytes) = decode::<32>(text.as_bytes()) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }
    }

    #[test]
    fn rejects() {
        assert_eq!(decode::<1>(b"zz"), Err(Base32Error::Overflow { bytes: 1 }));
        assert_eq!(decode::<1>(b"0e"), Err(Base32Error::Alphabet { bad: b'e', at: 1 }));
        assert_eq!(decode::<1>(b"0"), Err(Base32Error::Length { found: 1, bytes: 1 }));
        assert_eq!(decode::<1>(b"7z"), Ok([0xff]));
    }
}
