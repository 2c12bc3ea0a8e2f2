import java.io.FileInputStream;
import java.math.BigInteger;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.security.*;
import java.security.spec.*;
import java.util.*;
import javax.crypto.Cipher;
import javax.crypto.KeyGenerator;
import javax.crypto.SecretKey;
import javax.crypto.spec.*;

/**
 * The other side of a registration machine, with nothing but the JDK: what its server does with the public parts, what it encrypts for the machine, and
 * what a machine with its key in a file decrypts. It reads a properties file and prints properties; anything wrong ends it with a stack trace.
 */
class Machine {
    static final Properties in = new Properties();
    static final SecureRandom random = new SecureRandom();

    public static void main(String[] args) throws Exception {
        try (FileInputStream file = new FileInputStream(args[0])) {
            in.load(file);
        }
        byte[] data = bytes("data");
        for (String machine : new String[] {"tpm", "file"}) {
            byte[] encryption = bytes(machine + ".publicKey"), signing = bytes(machine + ".signPublicKey");
            out(machine + ".index", index(encryption));
            out(machine + ".signIndex", index(signing));
            PublicKey verifier = publicKey(signing);

            must(verify(verifier, data, bytes(machine + ".signature")), "signature");
            String header = in.getProperty(machine + ".header");
            must(header.startsWith("Authorization:"), "header");
            must(verify(verifier, data, Base64.getUrlDecoder().decode(header.substring(14))), "signature of the header");
            String[] token = in.getProperty(machine + ".token").split("\\.");
            must(token.length == 3, "token");
            String kid = new String(Base64.getUrlDecoder().decode(token[0]), StandardCharsets.UTF_8).replace(" ", "");
            must(kid.equals("{\"kid\":\"" + index(signing) + "\"}"), "kid of the token");
            must(verify(verifier, Base64.getUrlDecoder().decode(token[1]), Base64.getUrlDecoder().decode(token[2])), "signature of the token");

            PublicKey key = publicKey(encryption);
            OAEPParameterSpec padding = machine.equals("tpm") ? label00() : plain();
            out(machine + ".today", encrypt(key, padding, data, 12, 32));
            out(machine + ".old", encrypt(key, padding, data, 16, 12));
            String database = in.getProperty("database");
            System.out.println(machine + ".db=" + Base64.getEncoder().encodeToString(oaep(Cipher.ENCRYPT_MODE, key, padding, database.getBytes(StandardCharsets.UTF_8))));
        }
        PublicKey file = publicKey(bytes("file.publicKey"));
        out("android.today", encrypt(file, android(), data, 12, 32));
        out("android.old", encrypt(file, android(), data, 16, 12));

        // What is made for a machine, as that machine reads it.
        PrivateKey own = KeyFactory.getInstance("RSA").generatePrivate(new PKCS8EncodedKeySpec(bytes("reg.key")));
        Map<String, OAEPParameterSpec> paddings = Map.of("file", plain(), "tpm", label00(), "android", android());
        for (Map.Entry<String, OAEPParameterSpec> e : paddings.entrySet()) {
            must(Arrays.equals(data, decrypt(own, e.getValue(), bytes("made." + e.getKey()))), "data for " + e.getKey());
        }
        byte[] block = Base64.getDecoder().decode(in.getProperty("made.db"));
        out("made.db", oaep(Cipher.DECRYPT_MODE, own, plain(), block));
        out("signed", sign(own, data));
    }

    static void must(boolean holds, String what) {
        if (!holds) {
            throw new IllegalStateException(what);
        }
    }

    static byte[] bytes(String name) {
        return Base64.getUrlDecoder().decode(in.getProperty(name));
    }

    static void out(String name, byte[] value) {
        out(name, Base64.getUrlEncoder().withoutPadding().encodeToString(value));
    }

    static void out(String name, String value) {
        System.out.println(name + "=" + value);
    }

    static OAEPParameterSpec plain() {
        return new OAEPParameterSpec("SHA-256", "MGF1", MGF1ParameterSpec.SHA256, PSource.PSpecified.DEFAULT);
    }

    static OAEPParameterSpec label00() {
        return new OAEPParameterSpec("SHA-256", "MGF1", MGF1ParameterSpec.SHA256, new PSource.PSpecified(new byte[] {0}));
    }

    static OAEPParameterSpec android() {
        return new OAEPParameterSpec("SHA-256", "MGF1", MGF1ParameterSpec.SHA1, PSource.PSpecified.DEFAULT);
    }

    static byte[] oaep(int mode, Key key, OAEPParameterSpec padding, byte[] data) throws Exception {
        Cipher cipher = Cipher.getInstance("RSA/ECB/OAEPPadding");
        cipher.init(mode, key, padding);
        return cipher.doFinal(data);
    }

    /** RSA block | iv | aad | ciphertext | tag */
    static byte[] encrypt(PublicKey key, OAEPParameterSpec padding, byte[] data, int ivSize, int aadSize) throws Exception {
        KeyGenerator generator = KeyGenerator.getInstance("AES");
        generator.init(256);
        SecretKey session = generator.generateKey();
        byte[] iv = new byte[ivSize], aad = new byte[aadSize];
        random.nextBytes(iv);
        random.nextBytes(aad);
        Cipher cipher = Cipher.getInstance("AES/GCM/NoPadding");
        cipher.init(Cipher.ENCRYPT_MODE, session, new GCMParameterSpec(128, iv));
        cipher.updateAAD(aad);
        byte[] sealed = cipher.doFinal(data), block = oaep(Cipher.ENCRYPT_MODE, key, padding, session.getEncoded());
        return ByteBuffer.allocate(block.length + ivSize + aadSize + sealed.length).put(block).put(iv).put(aad).put(sealed).array();
    }

    static byte[] decrypt(PrivateKey key, OAEPParameterSpec padding, byte[] sealed) throws Exception {
        byte[] session = oaep(Cipher.DECRYPT_MODE, key, padding, Arrays.copyOf(sealed, 256));
        Cipher cipher = Cipher.getInstance("AES/GCM/NoPadding");
        cipher.init(Cipher.DECRYPT_MODE, new SecretKeySpec(session, "AES"), new GCMParameterSpec(128, sealed, 256, 12));
        cipher.updateAAD(sealed, 268, 32);
        return cipher.doFinal(sealed, 300, sealed.length - 300);
    }

    static byte[] sign(PrivateKey key, byte[] data) throws Exception {
        Signature signature = Signature.getInstance("SHA256withRSA");
        signature.initSign(key);
        signature.update(data);
        return signature.sign();
    }

    static boolean verify(PublicKey key, byte[] data, byte[] signed) throws Exception {
        Signature signature = Signature.getInstance("SHA256withRSA");
        signature.initVerify(key);
        signature.update(data);
        return signature.verify(signed);
    }

    /** TPMT_PUBLIC of an RSA key (TPM 2.0 part 2 section 12.2.4), else SubjectPublicKeyInfo. */
    static PublicKey publicKey(byte[] part) throws Exception {
        KeyFactory factory = KeyFactory.getInstance("RSA");
        if (part[0] == 0x30) {
            return factory.generatePublic(new X509EncodedKeySpec(part));
        }
        ByteBuffer b = ByteBuffer.wrap(part);
        must(b.getShort() == 1, "type");
        b.getShort(); // name algorithm
        b.getInt(); // attributes
        b.position(b.position() + 2 + b.getShort(b.position())); // policy
        must(b.getShort() == 0x10, "symmetric algorithm");
        b.getShort(); // scheme
        b.getShort(); // its hash
        must(b.getShort() == 2048, "bits");
        int exponent = b.getInt();
        byte[] modulus = new byte[b.getShort()];
        b.get(modulus);
        must(!b.hasRemaining(), "end");
        return factory.generatePublic(new RSAPublicKeySpec(new BigInteger(1, modulus), BigInteger.valueOf(exponent)));
    }

    static String index(byte[] part) throws Exception {
        StringJoiner joiner = new StringJoiner(":");
        for (byte x : MessageDigest.getInstance("SHA-256").digest(part)) {
            joiner.add(String.format("%02x", x));
        }
        return joiner.toString();
    }
}
