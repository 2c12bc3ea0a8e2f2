// The other side of the format tests: MOSIP's formats, JOSE and COSE, written from their descriptions with what the JDK has, and with
// BouncyCastle for secp256k1 and Argon2 alone. It reads one request per line, an operation and its arguments in base64url, and answers each
// with a line: "ok" and the results, or "error" and why.

import java.io.*;
import java.math.BigInteger;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.security.*;
import java.security.cert.*;
import java.security.interfaces.*;
import java.security.spec.*;
import java.util.*;
import java.util.zip.*;
import javax.crypto.*;
import javax.crypto.spec.*;
import org.bouncycastle.crypto.generators.Argon2BytesGenerator;
import org.bouncycastle.crypto.params.Argon2Parameters;
import org.bouncycastle.jce.provider.BouncyCastleProvider;

public class Formats {
    static final SecureRandom RANDOM = new SecureRandom();
    static final Provider BC = new BouncyCastleProvider();
    static final byte[] SPLITTER = "#KEY_SPLITTER#".getBytes(StandardCharsets.US_ASCII);
    static final byte[] VERSION2 = "VER_R2".getBytes(StandardCharsets.US_ASCII);

    public static void main(String[] args) throws Exception {
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.US_ASCII), 1 << 20);
        PrintStream out = new PrintStream(new FileOutputStream(FileDescriptor.out), false, StandardCharsets.US_ASCII);
        for (String line; (line = in.readLine()) != null; ) {
            try {
                String[] words = line.split(" ", -1);
                byte[][] arguments = new byte[words.length - 1][];
                for (int i = 1; i < words.length; i++) {
                    arguments[i - 1] = unbase64(words[i]);
                }
                StringBuilder answer = new StringBuilder("ok");
                for (byte[] result : run(words[0], arguments)) {
                    answer.append(' ').append(base64(result));
                }
                out.println(answer);
            } catch (Throwable t) {
                out.println("error " + t.toString().replaceAll("\\s+", " "));
            }
            out.flush();
        }
    }

    static byte[][] one(byte[] b) { return new byte[][] {b}; }
    static byte[][] one(String s) { return one(s.getBytes(StandardCharsets.UTF_8)); }
    static String text(byte[] b) { return new String(b, StandardCharsets.UTF_8); }

    static byte[][] run(String op, byte[][] a) throws Exception {
        switch (op) {
        case "payload_encrypt": return one(encryptPayload(text(a[0]), certificate(a[1]), a[2], a[3], a[4]));
        case "payload_decrypt": return one(decryptPayload(rsa(a[0]), a[1], a[2], a[3]));
        case "packet_encrypt": return one(encryptPacket(certificate(a[0]), a[1]));
        case "packet_decrypt": return one(decryptPacket(rsa(a[0]), a[1]));
        case "key_wrap": return one(wrapKey(certificate(a[0]).getPublicKey(), a[1]));
        case "key_unwrap": return one(unwrapKey(rsa(a[0]), a[1]));
        case "pin_encrypt": return one(encryptPIN(text(a[0]), a[1], Integer.parseInt(text(a[2]))));
        case "pin_decrypt": return one(decryptPIN(text(a[0]), a[1], Integer.parseInt(text(a[2]))));
        case "client_encrypt": return one(encryptClient(certificate(a[0]).getPublicKey(), text(a[1]), a[2], text(a[3]).equals("old")));
        case "client_decrypt": return one(decryptClient(rsa(a[0]), text(a[1]), a[2]));
        case "block_encrypt": return one(oaep(Cipher.ENCRYPT_MODE, certificate(a[0]).getPublicKey(), text(a[1]), a[2]));
        case "block_decrypt": return one(oaep(Cipher.DECRYPT_MODE, rsa(a[0]), text(a[1]), a[2]));
        case "names": return names(text(a[0]), text(a[1]), text(a[2]), a[3]);
        case "zk_encrypt": return one(encryptAttribute(a[0], Integer.parseInt(text(a[1])), text(a[2]), a[3]));
        case "zk_decrypt": return decryptAttribute(a[0], text(a[1]), a[2]);
        case "zk_wrap": return one(ecb(Cipher.ENCRYPT_MODE, a[0], a[1]));
        case "zk_unwrap": return one(ecb(Cipher.DECRYPT_MODE, a[0], a[1]));
        case "zk_seal": return one(concat(thumbprint(certificate(a[0])), oaep(Cipher.ENCRYPT_MODE, certificate(a[0]).getPublicKey(), "file", a[1])));
        case "zk_open": return one(oaep(Cipher.DECRYPT_MODE, rsa(a[0]), "file", Arrays.copyOfRange(a[1], 32, a[1].length)));
        case "argon2": return one(argon2(a[0], a[1]));
        case "jwe_encrypt": return one(encryptJWE(certificate(a[0]), a[1], text(a[2]).equals("zip")));
        case "jwe_decrypt": return one(decryptJWE(rsa(a[0]), text(a[1])));
        case "jws_sign": return one(signJWS(text(a[0]), a[1], a[2], a[3], text(a[4])));
        case "jws_verify": return one(verifyJWS(text(a[0]), a[1], text(a[2]), a[3], text(a[4])));
        case "raw_sign": return one(sign(text(a[0]), a[1], a[2]));
        case "raw_verify": return one(verify(text(a[0]), a[1], a[2], a[3]) ? "true" : "false");
        case "base58": return one("z" + base58(a[0]));
        case "unbase58": return one(unbase58(text(a[0]).substring(1)));
        case "cose_sign": return one(signCOSE(text(a[0]), a[1], a[2], a[3], false));
        case "cose_verify": return one(verifyCOSE(text(a[0]), a[1], a[2], a[3]));
        case "cwt_sign": return one(signCWT(text(a[0]), a[1], a[2], text(a[3]), Long.parseLong(text(a[4])), a[5]));
        case "cwt_verify": return verifyCWT(text(a[0]), a[1], a[2]);
        }
        throw new IllegalArgumentException("no operation " + op);
    }

    // ---- Bytes

    static String base64(byte[] b) { return Base64.getUrlEncoder().withoutPadding().encodeToString(b); }
    static byte[] unbase64(String s) { return Base64.getUrlDecoder().decode(s); }

    static byte[] concat(byte[]... parts) {
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        for (byte[] p : parts) {
            out.writeBytes(p);
        }
        return out.toByteArray();
    }

    static byte[] random(int n) {
        byte[] b = new byte[n];
        RANDOM.nextBytes(b);
        return b;
    }

    static byte[] slice(byte[] b, int from, int to) { return Arrays.copyOfRange(b, from, to); }

    static int index(byte[] b, byte[] what) {
        for (int i = 0; i + what.length <= b.length; i++) {
            if (Arrays.equals(b, i, i + what.length, what, 0, what.length)) {
                return i;
            }
        }
        throw new IllegalArgumentException("no splitter");
    }

    static byte[] sha256(byte[] b) throws Exception { return MessageDigest.getInstance("SHA-256").digest(b); }

    // ---- Keys and certificates

    static X509Certificate certificate(byte[] der) throws Exception {
        return (X509Certificate) CertificateFactory.getInstance("X.509").generateCertificate(new ByteArrayInputStream(der));
    }

    static byte[] thumbprint(X509Certificate c) throws Exception { return sha256(c.getEncoded()); }

    static RSAPrivateKey rsa(byte[] pkcs8) throws Exception {
        return (RSAPrivateKey) KeyFactory.getInstance("RSA").generatePrivate(new PKCS8EncodedKeySpec(pkcs8));
    }

    static PrivateKey privateKey(String alg, byte[] pkcs8) throws Exception {
        return factory(alg).generatePrivate(new PKCS8EncodedKeySpec(pkcs8));
    }

    static PublicKey publicKey(String alg, byte[] spki) throws Exception {
        return factory(alg).generatePublic(new X509EncodedKeySpec(spki));
    }

    static KeyFactory factory(String alg) throws Exception {
        if (alg.equals("ES256K")) {
            return KeyFactory.getInstance("EC", BC);
        }
        return KeyFactory.getInstance(alg.startsWith("ES") ? "EC" : alg.equals("EdDSA") ? "Ed25519" : "RSA");
    }

    // ---- Encryption

    static byte[] gcm(int mode, byte[] key, byte[] iv, byte[] aad, byte[] data) throws Exception {
        Cipher c = Cipher.getInstance("AES/GCM/NoPadding");
        c.init(mode, new SecretKeySpec(key, "AES"), new GCMParameterSpec(128, iv));
        if (aad.length > 0) {
            c.updateAAD(aad);
        }
        return c.doFinal(data);
    }

    static byte[] ecb(int mode, byte[] key, byte[] data) throws Exception {
        Cipher c = Cipher.getInstance("AES/ECB/NoPadding");
        c.init(mode, new SecretKeySpec(key, "AES"));
        return c.doFinal(data);
    }

    static byte[] oaep(int mode, Key key, String padding, byte[] data) throws Exception {
        byte[] label = padding.equals("tpm") ? new byte[] {0} : new byte[0];
        MGF1ParameterSpec mgf = padding.equals("android") ? MGF1ParameterSpec.SHA1 : MGF1ParameterSpec.SHA256;
        Cipher c = Cipher.getInstance("RSA/ECB/OAEPPadding");
        c.init(mode, key, new OAEPParameterSpec("SHA-256", "MGF1", mgf, new PSource.PSpecified(label)));
        return c.doFinal(data);
    }

    static byte[] encryptPayload(String kind, X509Certificate to, byte[] data, byte[] aad, byte[] salt) throws Exception {
        byte[] key = random(32);
        byte[] head = concat(kind.startsWith("113") ? new byte[0] : thumbprint(to), oaep(Cipher.ENCRYPT_MODE, to.getPublicKey(), "file", key), SPLITTER);
        if (salt.length > 0) {
            return concat(head, gcm(Cipher.ENCRYPT_MODE, key, salt, aad, data));
        }
        if (!kind.equals("ver2")) {
            byte[] iv = random(16);
            return concat(head, gcm(Cipher.ENCRYPT_MODE, key, iv, aad, data), iv);
        }
        byte[] own = random(32);
        return concat(VERSION2, head, own, gcm(Cipher.ENCRYPT_MODE, key, slice(own, 0, 12), own, data));
    }

    static byte[] decryptPayload(PrivateKey k, byte[] payload, byte[] aad, byte[] salt) throws Exception {
        int at = index(payload, SPLITTER);
        byte[] head = slice(payload, 0, at), body = slice(payload, at + SPLITTER.length, payload.length);
        boolean version2 = head.length == 6 + 32 + 256 && Arrays.equals(slice(head, 0, 6), VERSION2);
        byte[] key = oaep(Cipher.DECRYPT_MODE, k, "file", slice(head, head.length - 256, head.length));
        if (salt.length > 0) {
            return gcm(Cipher.DECRYPT_MODE, key, salt, aad, body);
        }
        if (version2) {
            byte[] own = slice(body, 0, 32);
            return gcm(Cipher.DECRYPT_MODE, key, slice(own, 0, 12), own, slice(body, 32, body.length));
        }
        int end = body.length - 16;
        return gcm(Cipher.DECRYPT_MODE, key, slice(body, end, body.length), aad, slice(body, 0, end));
    }

    static byte[] encryptPacket(X509Certificate to, byte[] data) throws Exception {
        byte[] nonce = random(12), aad = random(32);
        return concat(nonce, aad, encryptPayload("salt", to, data, aad, nonce));
    }

    static byte[] decryptPacket(PrivateKey k, byte[] packet) throws Exception {
        return decryptPayload(k, slice(packet, 44, packet.length), slice(packet, 12, 44), slice(packet, 0, 12));
    }

    static byte[] wrapKey(PublicKey module, byte[] pkcs8) throws Exception {
        byte[] key = random(32), iv = random(16);
        return concat(oaep(Cipher.ENCRYPT_MODE, module, "file", key), SPLITTER, gcm(Cipher.ENCRYPT_MODE, key, iv, new byte[0], pkcs8), iv);
    }

    static byte[] unwrapKey(PrivateKey module, byte[] blob) throws Exception {
        return decryptPayload(module, blob, new byte[0], new byte[0]);
    }

    static byte[] pinKey(String pin, byte[] salt, int iterations) throws Exception {
        return SecretKeyFactory.getInstance("PBKDF2WithHmacSHA512").generateSecret(new PBEKeySpec(pin.toCharArray(), salt, iterations, 256)).getEncoded();
    }

    static byte[] encryptPIN(String pin, byte[] data, int iterations) throws Exception {
        byte[] salt = random(32), nonce = random(12);
        return concat(salt, nonce, gcm(Cipher.ENCRYPT_MODE, pinKey(pin, salt, iterations), nonce, salt, data));
    }

    static byte[] decryptPIN(String pin, byte[] data, int iterations) throws Exception {
        byte[] salt = slice(data, 0, 32);
        return gcm(Cipher.DECRYPT_MODE, pinKey(pin, salt, iterations), slice(data, 32, 44), salt, slice(data, 44, data.length));
    }

    static byte[] encryptClient(PublicKey to, String padding, byte[] data, boolean old) throws Exception {
        byte[] key = random(32), iv = random(old ? 16 : 12), aad = random(old ? 12 : 32);
        return concat(oaep(Cipher.ENCRYPT_MODE, to, padding, key), iv, aad, gcm(Cipher.ENCRYPT_MODE, key, iv, aad, data));
    }

    static byte[] decryptClient(PrivateKey k, String padding, byte[] data) throws Exception {
        byte[] key = oaep(Cipher.DECRYPT_MODE, k, padding, slice(data, 0, 256));
        return gcm(Cipher.DECRYPT_MODE, key, slice(data, 256, 268), slice(data, 268, 300), slice(data, 300, data.length));
    }

    static byte[][] names(String app, String ref, String third, byte[] bytes) throws Exception {
        byte[] unique = MessageDigest.getInstance("SHA-1").digest((app + "_" + ref + "_" + third).getBytes(StandardCharsets.UTF_8));
        StringBuilder keyIndex = new StringBuilder();
        for (byte b : sha256(bytes)) {
            keyIndex.append(keyIndex.length() > 0 ? ":" : "").append(String.format("%02x", b));
        }
        return new byte[][] {hex(unique).toUpperCase().getBytes(), base64(sha256(unique)).getBytes(), keyIndex.toString().getBytes()};
    }

    static String hex(byte[] b) { return HexFormat.of().formatHex(b); }

    static byte[] attributeKey(byte[] random, String id) throws Exception {
        return ecb(Cipher.ENCRYPT_MODE, random, sha256(id.getBytes(StandardCharsets.UTF_8)));
    }

    static byte[] encryptAttribute(byte[] random, int index, String id, byte[] data) throws Exception {
        byte[] nonce = random(12), aad = random(32);
        return concat(ByteBuffer.allocate(4).putInt(index).array(), nonce, aad, gcm(Cipher.ENCRYPT_MODE, attributeKey(random, id), nonce, aad, data));
    }

    static byte[][] decryptAttribute(byte[] random, String id, byte[] data) throws Exception {
        byte[] plain = gcm(Cipher.DECRYPT_MODE, attributeKey(random, id), slice(data, 4, 16), slice(data, 16, 48), slice(data, 48, data.length));
        return new byte[][] {String.valueOf(ByteBuffer.wrap(data).getInt()).getBytes(), plain};
    }

    static byte[] argon2(byte[] data, byte[] salt) {
        Argon2BytesGenerator g = new Argon2BytesGenerator();
        g.init(new Argon2Parameters.Builder(Argon2Parameters.ARGON2_id).withVersion(Argon2Parameters.ARGON2_VERSION_13).withIterations(10)
            .withMemoryAsKB(65536).withParallelism(2).withSalt(salt).build());
        byte[] hash = new byte[32];
        g.generateBytes(data, hash);
        return hash;
    }

    // ---- JSON Web Encryption

    static String encryptJWE(X509Certificate to, byte[] data, boolean zip) throws Exception {
        String header = "{\"kid\":\"" + base64(thumbprint(to)) + "\",\"cty\":\"JWT\",\"enc\":\"A256GCM\",\"typ\":\"JWT\",\"alg\":\"RSA-OAEP-256\""
            + (zip ? ",\"zip\":\"DEF\"" : "") + "}";
        String first = base64(header.getBytes(StandardCharsets.UTF_8));
        byte[] key = random(32), iv = random(12);
        if (zip) {
            ByteArrayOutputStream out = new ByteArrayOutputStream();
            try (DeflaterOutputStream d = new DeflaterOutputStream(out, new Deflater(8, true))) {
                d.write(data);
            }
            data = out.toByteArray();
        }
        byte[] sealed = gcm(Cipher.ENCRYPT_MODE, key, iv, first.getBytes(StandardCharsets.US_ASCII), data);
        int end = sealed.length - 16;
        return String.join(".", first, base64(oaep(Cipher.ENCRYPT_MODE, to.getPublicKey(), "file", key)), base64(iv), base64(slice(sealed, 0, end)),
            base64(slice(sealed, end, sealed.length)));
    }

    static byte[] decryptJWE(PrivateKey k, String token) throws Exception {
        String[] parts = token.split("\\.", -1);
        if (parts.length != 5 || !member(parts[0], "alg").equals("RSA-OAEP-256") || !member(parts[0], "enc").equals("A256GCM")) {
            throw new IllegalArgumentException("not that kind of token");
        }
        byte[] key = oaep(Cipher.DECRYPT_MODE, k, "file", unbase64(parts[1]));
        byte[] data = gcm(Cipher.DECRYPT_MODE, key, unbase64(parts[2]), parts[0].getBytes(StandardCharsets.US_ASCII), concat(unbase64(parts[3]), unbase64(parts[4])));
        if (!member(parts[0], "zip").equals("DEF")) {
            return data;
        }
        return new InflaterInputStream(new ByteArrayInputStream(data), new Inflater(true)).readAllBytes();
    }

    // member returns a member of a header that is a text or a word, "" if it is not there.
    static String member(String part, String name) {
        java.util.regex.Matcher m = java.util.regex.Pattern.compile("\"" + name + "\"\\s*:\\s*(?:\"([^\"]*)\"|(true|false))").matcher(text(unbase64(part)));
        return !m.find() ? "" : m.group(1) != null ? m.group(1) : m.group(2);
    }

    // ---- Signatures

    static Signature signature(String alg) throws Exception {
        String bits = alg.substring(alg.length() - 3);
        switch (alg) {
        case "RS256": case "RS384": case "RS512": return Signature.getInstance("SHA" + bits + "withRSA");
        case "PS256": case "PS384": case "PS512":
            Signature s = Signature.getInstance("RSASSA-PSS");
            MGF1ParameterSpec mgf = alg.equals("PS256") ? MGF1ParameterSpec.SHA256 : alg.equals("PS384") ? MGF1ParameterSpec.SHA384 : MGF1ParameterSpec.SHA512;
            s.setParameter(new PSSParameterSpec("SHA-" + bits, "MGF1", mgf, Integer.parseInt(bits) / 8, 1));
            return s;
        case "ES256": case "ES384": case "ES512": return Signature.getInstance("SHA" + bits + "withECDSAinP1363Format");
        case "ES256K": return Signature.getInstance("SHA256withPLAIN-ECDSA", BC);
        case "EdDSA": return Signature.getInstance("Ed25519");
        }
        throw new IllegalArgumentException(alg);
    }

    static byte[] sign(String alg, byte[] pkcs8, byte[] data) throws Exception {
        Signature s = signature(alg);
        s.initSign(privateKey(alg, pkcs8));
        s.update(data);
        return s.sign();
    }

    static boolean verify(String alg, byte[] spki, byte[] data, byte[] sig) throws Exception {
        Signature s = signature(alg);
        s.initVerify(publicKey(alg, spki));
        s.update(data);
        return s.verify(sig);
    }

    // The modes: attached, detached, b64false (detached, and signed as it is), mosip (b64 is false, and the payload in base64url all the same).
    static String signJWS(String alg, byte[] pkcs8, byte[] certificate, byte[] payload, String mode) throws Exception {
        boolean unencoded = mode.equals("b64false") || mode.equals("mosip");
        StringBuilder header = new StringBuilder("{");
        if (certificate.length > 0) {
            header.append("\"x5c\":[\"").append(Base64.getEncoder().encodeToString(certificate)).append("\"],\"x5t#S256\":\"").append(base64(sha256(certificate))).append("\",");
        }
        if (unencoded) {
            header.append("\"b64\":false,\"crit\":[\"b64\"],");
        }
        String first = base64(header.append("\"kid\":\"a kid\",\"alg\":\"").append(alg).append("\"}").toString().getBytes(StandardCharsets.UTF_8));
        byte[] signed = unencoded ? payload : base64(payload).getBytes(StandardCharsets.US_ASCII);
        byte[] sig = sign(alg, pkcs8, concat((first + ".").getBytes(StandardCharsets.US_ASCII), signed));
        return first + "." + (mode.equals("detached") || mode.equals("b64false") ? "" : base64(payload)) + "." + base64(sig);
    }

    static byte[] verifyJWS(String alg, byte[] spki, String token, byte[] detached, String mode) throws Exception {
        String[] parts = token.split("\\.", -1);
        if (parts.length != 3 || !member(parts[0], "alg").equals(alg)) {
            throw new IllegalArgumentException("not that kind of token");
        }
        boolean unencoded = mode.equals("b64false") || mode.equals("mosip");
        if (unencoded != member(parts[0], "b64").equals("false") || parts[1].isEmpty() != (mode.equals("detached") || mode.equals("b64false"))) {
            throw new IllegalArgumentException("not of the mode " + mode);
        }
        byte[] payload = parts[1].isEmpty() ? detached : unbase64(parts[1]);
        byte[] signed = unencoded ? payload : base64(payload).getBytes(StandardCharsets.US_ASCII);
        if (!verify(alg, spki, concat((parts[0] + ".").getBytes(StandardCharsets.US_ASCII), signed), unbase64(parts[2]))) {
            throw new SignatureException("the signature is wrong");
        }
        return payload;
    }

    static final String BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";

    static String base58(byte[] b) {
        StringBuilder s = new StringBuilder();
        for (BigInteger n = new BigInteger(1, b); n.signum() > 0; n = n.divide(BigInteger.valueOf(58))) {
            s.append(BASE58.charAt(n.mod(BigInteger.valueOf(58)).intValue()));
        }
        for (int i = 0; i < b.length && b[i] == 0; i++) {
            s.append('1');
        }
        return s.reverse().toString();
    }

    static byte[] unbase58(String s) {
        BigInteger n = BigInteger.ZERO;
        int zeros = 0;
        for (int i = 0; i < s.length(); i++) {
            n = n.multiply(BigInteger.valueOf(58)).add(BigInteger.valueOf(BASE58.indexOf(s.charAt(i))));
            if (zeros == i && s.charAt(i) == '1') {
                zeros++;
            }
        }
        byte[] b = n.signum() == 0 ? new byte[0] : n.toByteArray();
        return concat(new byte[zeros], b.length > 0 && b[0] == 0 ? slice(b, 1, b.length) : b);
    }

    // ---- CBOR (RFC 8949), as far as it is needed: integers, byte and text strings, arrays, maps, tags

    static byte[] head(int major, long n) {
        ByteBuffer b = ByteBuffer.allocate(9);
        if (n < 24) {
            b.put((byte) (major << 5 | n));
        } else if (n < 256) {
            b.put((byte) (major << 5 | 24)).put((byte) n);
        } else if (n < 65536) {
            b.put((byte) (major << 5 | 25)).putShort((short) n);
        } else if (n < 1L << 32) {
            b.put((byte) (major << 5 | 26)).putInt((int) n);
        } else {
            b.put((byte) (major << 5 | 27)).putLong(n);
        }
        return slice(b.array(), 0, b.position());
    }

    static byte[] encode(Object o) {
        if (o instanceof Number) {
            long n = ((Number) o).longValue();
            return n < 0 ? head(1, -1 - n) : head(0, n);
        }
        if (o instanceof byte[]) {
            return concat(head(2, ((byte[]) o).length), (byte[]) o);
        }
        if (o instanceof String) {
            byte[] b = ((String) o).getBytes(StandardCharsets.UTF_8);
            return concat(head(3, b.length), b);
        }
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        if (o instanceof List) {
            out.writeBytes(head(4, ((List<?>) o).size()));
            for (Object item : (List<?>) o) {
                out.writeBytes(encode(item));
            }
            return out.toByteArray();
        }
        out.writeBytes(head(5, ((Map<?, ?>) o).size()));
        for (Map.Entry<?, ?> e : ((Map<?, ?>) o).entrySet()) {
            out.writeBytes(encode(e.getKey()));
            out.writeBytes(encode(e.getValue()));
        }
        return out.toByteArray();
    }

    // Tagged is an item with a tag.
    static class Tagged {
        final long tag;
        final Object item;
        Tagged(long tag, Object item) { this.tag = tag; this.item = item; }
    }

    static Object decode(ByteBuffer b) {
        int first = b.get() & 0xff, major = first >> 5;
        long n = first & 31;
        if (major == 7 && n == 22) {
            return null;
        }
        if (n == 24) {
            n = b.get() & 0xff;
        } else if (n == 25) {
            n = b.getShort() & 0xffff;
        } else if (n == 26) {
            n = b.getInt() & 0xffffffffL;
        } else if (n == 27) {
            n = b.getLong();
        } else if (n > 27) {
            throw new IllegalArgumentException("indefinite length");
        }
        switch (major) {
        case 0: return n;
        case 1: return -1 - n;
        case 2: case 3:
            byte[] s = new byte[(int) n];
            b.get(s);
            return major == 2 ? s : text(s);
        case 4:
            List<Object> list = new ArrayList<>();
            for (long i = 0; i < n; i++) {
                list.add(decode(b));
            }
            return list;
        case 5:
            Map<Object, Object> map = new LinkedHashMap<>();
            for (long i = 0; i < n; i++) {
                Object key = decode(b);
                if (map.put(key, decode(b)) != null) {
                    throw new IllegalArgumentException("a key twice");
                }
            }
            return map;
        case 6: return new Tagged(n, decode(b));
        }
        throw new IllegalArgumentException("item " + first);
    }

    static Object decodeAll(byte[] b) {
        ByteBuffer buffer = ByteBuffer.wrap(b);
        Object o = decode(buffer);
        if (buffer.hasRemaining()) {
            throw new IllegalArgumentException("bytes after the end");
        }
        return o;
    }

    // ---- COSE_Sign1 (RFC 9052) and CWT (RFC 8392), as MOSIP writes them

    static final Map<String, Long> COSE = Map.ofEntries(Map.entry("ES256", -7L), Map.entry("ES384", -35L), Map.entry("ES512", -36L), Map.entry("EdDSA", -8L),
        Map.entry("PS256", -37L), Map.entry("PS384", -38L), Map.entry("PS512", -39L), Map.entry("RS256", -257L), Map.entry("RS384", -258L),
        Map.entry("RS512", -259L), Map.entry("ES256K", -47L));

    static byte[] signCOSE(String alg, byte[] pkcs8, byte[] certificate, byte[] payload, boolean cwt) throws Exception {
        Map<Object, Object> header = new LinkedHashMap<>();
        header.put(1, COSE.get(alg));
        if (certificate.length > 0) {
            header.put(33, certificate);
            header.put(34, sha256(certificate));
            header.put(35, "https://example.org/certificate");
        }
        byte[] protectedHeader = encode(header);
        byte[] sig = sign(alg, pkcs8, encode(List.of("Signature1", protectedHeader, new byte[0], payload)));
        byte[] message = concat(head(6, 18), encode(List.of(protectedHeader, Map.of(4, "a kid".getBytes()), payload, sig)));
        return cwt ? concat(head(6, 61), message) : message;
    }

    static byte[] verifySign1(String alg, byte[] spki, Object message, byte[] detached) throws Exception {
        if (!(message instanceof Tagged) || ((Tagged) message).tag != 18) {
            throw new IllegalArgumentException("not tagged");
        }
        List<?> items = (List<?>) ((Tagged) message).item;
        byte[] protectedHeader = (byte[]) items.get(0);
        Map<?, ?> header = (Map<?, ?>) decodeAll(protectedHeader);
        if (items.size() != 4 || !COSE.get(alg).equals(header.get(1L)) || !(items.get(1) instanceof Map)) {
            throw new IllegalArgumentException("not that kind of message");
        }
        byte[] payload = items.get(2) == null ? detached : (byte[]) items.get(2);
        if (!verify(alg, spki, encode(List.of("Signature1", protectedHeader, new byte[0], payload)), (byte[]) items.get(3))) {
            throw new SignatureException("the signature is wrong");
        }
        return payload;
    }

    static byte[] verifyCOSE(String alg, byte[] spki, byte[] message, byte[] detached) throws Exception {
        return verifySign1(alg, spki, decodeAll(message), detached);
    }

    static byte[] signCWT(String alg, byte[] pkcs8, byte[] certificate, String subject, long expires, byte[] identity) throws Exception {
        Map<Object, Object> claims = new LinkedHashMap<>();
        claims.put(1, "https://example.org");
        claims.put(2, subject);
        claims.put(3, "audience");
        claims.put(4, expires);
        claims.put(5, expires - 86400);
        claims.put(6, expires - 86400);
        claims.put(7, "an id".getBytes());
        claims.put(169, identity);
        claims.put("name", List.of("a", 1, -5));
        return signCOSE(alg, pkcs8, certificate, encode(claims), true);
    }

    static byte[][] verifyCWT(String alg, byte[] spki, byte[] token) throws Exception {
        Object o = decodeAll(token);
        if (!(o instanceof Tagged) || ((Tagged) o).tag != 61) {
            throw new IllegalArgumentException("not a CWT");
        }
        Map<?, ?> claims = (Map<?, ?>) decodeAll(verifySign1(alg, spki, ((Tagged) o).item, null));
        return new byte[][] {((String) claims.get(1L)).getBytes(), ((String) claims.get(2L)).getBytes(), claims.get(4L).toString().getBytes(), (byte[]) claims.get(169L)};
    }
}
